from mmoe.commands.main import main

main()
