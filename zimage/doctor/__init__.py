"""`zimage doctor`: what this machine has and lacks for the configured server, found out without starting it.

Each module looks at one thing and answers rows; `report` puts them together. A library that is broken is a row too.
"""
