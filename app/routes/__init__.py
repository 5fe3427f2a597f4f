"""The routes by resource; ``app/api.py`` holds those that change something and puts all together."""
