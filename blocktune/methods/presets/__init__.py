"""Published methods. Each module registers its classes when it is imported."""
