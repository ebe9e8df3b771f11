"""How place enters."""
