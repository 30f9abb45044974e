"""The bundled demo model: the world that it draws, its training and its evaluation."""
