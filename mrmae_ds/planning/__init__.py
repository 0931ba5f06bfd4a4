"""What a recipe will cost, told before anything is submitted."""
