"""A page to try finished rows on: any prompt, the base model and ablated ones side by side. Only `page` and `server` need gradio."""
