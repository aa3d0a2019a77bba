from minigpt.commands.cli import main

raise SystemExit(main())
