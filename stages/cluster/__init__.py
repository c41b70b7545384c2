"""Workers on the nodes of a Ray cluster: the connection, the tasks and who has them, what a worker does with them."""
