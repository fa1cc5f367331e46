"""What a study found, for a reader: leaderboard, findings, figures, one page."""
