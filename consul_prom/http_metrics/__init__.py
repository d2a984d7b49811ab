"""HTTP request metrics and the route templates that label them."""
