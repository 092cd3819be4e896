"""Private parts of other libraries that this package depends on, one module per library."""
