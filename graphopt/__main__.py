"""python -m graphopt"""

from graphopt.tools.command_line import command

command()
