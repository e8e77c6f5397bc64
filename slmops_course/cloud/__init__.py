"""The course's steps on Azure Machine Learning: one pipeline definition, run here or sent there."""
