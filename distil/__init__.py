"""What makes the method practical: data, networks of others, sampling, scores. The method is in lift_place.py."""
