"""Parts of `graphopt profile`: the machine's roofs, what each kernel makes of them, and a chart."""
