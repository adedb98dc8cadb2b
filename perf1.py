import sys; sys.argv=["x","p",*sys.argv[1:]]
exec(open("/tmp/ab/var.py").read())
