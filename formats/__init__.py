"""The container: specification, reader, writer, code tables. Knows no other package of df11."""
