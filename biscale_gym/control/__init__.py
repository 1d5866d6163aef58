"""What a controller sees and answers: scenarios, the controller protocol, lookup by name, whole runs."""
