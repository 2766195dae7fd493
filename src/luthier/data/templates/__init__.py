"""Chat templates that come along, by name: `model.chat_template: chatml`.

For base models whose tokenizer has none. Each prints every message, tool definitions, tool calls (name and
arguments as JSON) and tool results; its control strings are few and must be atomic tokens (`model.add_tokens`).

    chatml   <|im_start|> <|im_end|>
    llama3   <|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|>
"""
