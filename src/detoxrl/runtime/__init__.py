"""How does a run live on a machine?"""
