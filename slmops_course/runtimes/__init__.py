"""The same tuned model in other runtimes: each ends as a ChatModel, so evaluation and the scoreboard know nothing else.

`comparison` scores them beside PyTorch and keeps the figures. Its `table` says which were run, and which only validated.
"""
