"""From rows to text: reading data, recognising its form, and filling templates. No torch here."""
