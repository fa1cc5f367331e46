"""What a study found, for a reader: leaderboard, findings, figures, one page.

leaderboard  evaluations ─► one ranking
findings     comparisons ─► sentences in plain words
plots        tables ─► small figures, drawn on a canvas
page         all of it ─► one self-contained HTML page
"""
