"""`ultrarec study`: runs that are compared, and the page of results made of them."""
