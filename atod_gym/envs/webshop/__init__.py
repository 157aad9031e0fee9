"""WebShop: the environment, its settings and a scripted expert."""
