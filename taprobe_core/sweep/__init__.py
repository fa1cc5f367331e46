"""A sweep of three stages: which configurations, what is fitted for them, and who goes on.

    recipes    a configuration: its factors, its id; a recipe by its content
    space      the configurations of each stage, and their recipes
    boards     what the evaluation says of recipes, as a ranking of configurations; paired deltas
    shortlist  who goes on, and what the choice is worth on test
    stability  how far a ranking depends on seeds, problems, settings

Configurations become recipes, recipes are measured by `evaluation`, and every table here is a view
of that: a pure function of a study and of tables. Running a sweep belongs in `pipeline`.
"""
