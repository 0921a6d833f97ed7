"""onepass behind the interfaces of other libraries. Nothing here is imported by `import onepass`."""
