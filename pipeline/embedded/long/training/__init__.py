"""How the long embedded model is made: its batches, stages and evaluation; the rest it shares with the first."""
