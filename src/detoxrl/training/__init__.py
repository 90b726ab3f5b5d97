"""How does the policy learn?"""
