"""What authors use and learners never import: executing the notebooks, translations."""
