"""Trains M: data, methods, the Trainer, evaluation, and training split over cloud and edge."""
