"""What a run costs, by arithmetic alone: parameters, FLOPs, memory and hours, and the tables that set them beside
measurements.
"""
