"""What one instance carries within the SLO, and at what energy: the class tables that every placement planner reads."""
