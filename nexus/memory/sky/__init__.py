"""The sky as a block signs it: computed fast, checked within a tolerance, and solved for time and place."""
