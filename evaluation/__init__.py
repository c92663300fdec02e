"""What an evaluation says: figures, official scores, baselines, ablations, report, curves, chat."""
