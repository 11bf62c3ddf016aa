"""Published methods by name. A module here enters its classes into the table when imported."""
