"""HTTP for an Unroll server: REST, event streams, and the page that shows a network thinking."""
