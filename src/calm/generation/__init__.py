"""Generation: settings, prompts, the loop, compiled steps, completions of many prompts."""
