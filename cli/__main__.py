from pdengine.cli.main import main

main()
