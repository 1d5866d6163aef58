"""From a profile's CSV file to a preset of the modelled cluster."""
