"""The frame of the report page: HTML with `string.Template` fields, and its style sheet."""

STYLE = """
:root { --ink: #1b2430; --muted: #5f6b7a; --line: #e1e6ed; --paper: #ffffff; --ground: #f5f7fa; --accent: #1f5fbf }
* { box-sizing: border-box }
body { margin: 0; background: var(--ground); color: var(--ink); font: 15px/1.5 system-ui, sans-serif }
header, section { max-width: 1180px; margin: 0 auto; padding: 0 24px }
header { padding-top: 36px }
h1 { font-size: 26px; margin: 0 }
h2 { font-size: 19px; margin: 0 0 8px }
h3 { font-size: 15px; margin: 20px 0 2px }
.lead, .note { color: var(--muted); margin: 2px 0 8px }
.note { font-size: 13px }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(172px, 1fr)); gap: 12px; margin: 20px 0 24px }
.card { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 12px 14px }
.card b { display: block; font-size: 21px; font-variant-numeric: tabular-nums; color: var(--accent) }
.card span { display: block; font-weight: 600; font-size: 13px }
.card i { display: block; font-style: normal; font-size: 12px; color: var(--muted) }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 12px; padding: 20px 24px }
section { margin-bottom: 18px }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: 5px 12px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top }
th { color: var(--muted); font-weight: 600 }
.slices { display: grid; grid-template-columns: repeat(auto-fill, minmax(480px, 1fr)); gap: 18px }
.slice { border: 1px solid var(--line); border-radius: 10px; padding: 12px; min-width: 0 }
.rig { display: grid; grid-template-columns: repeat(3, 1fr); gap: 6px }
figure { margin: 0; font-size: 11px; color: var(--muted) }
figure img { width: 100%; display: block; border-radius: 4px; image-rendering: pixelated }
.single img { max-width: 320px }
.absent { display: grid; place-items: center; background: var(--ground); border-radius: 4px }
.caption { margin: 10px 0 6px }
.chunk td, .chunk th { padding: 2px 8px 2px 0; font-size: 12px; border: 0 }
.chunk .predicted { color: var(--accent) }
details pre { background: var(--ground); border-radius: 8px; padding: 14px; overflow-x: auto; font-size: 12px }
summary { cursor: pointer; color: var(--accent) }
@media (max-width: 640px) { .slices { grid-template-columns: 1fr } }
"""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>$style</style>
<script>$plotly</script>
</head>
<body>
<header><h1>$title</h1><p class="lead">$lead</p><div class="cards">$cards</div></header>
$body
</body>
</html>
"""
