"""One module per script: its arguments, and what it puts together from the layers below."""
