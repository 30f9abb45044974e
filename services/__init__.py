"""The five HTTP services. They know each other by URL only and never import one another."""
