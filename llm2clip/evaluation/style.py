"""The look of report.html."""

from __future__ import annotations

STYLE = """
:root{--bg:#f7f8fa;--card:#fff;--text:#1d2433;--muted:#667085;--line:#e3e6ec;--accent:#2f6fde;
--good:#1f9d76;--good-bg:#e4f5ee;--bad:#b54708;--bad-bg:#fdf0e3;--best:#eef4ff}
@media (prefers-color-scheme:dark){:root{--bg:#12161e;--card:#1a2029;--text:#e6e9f0;--muted:#98a2b3;
--line:#323a49;
--accent:#7aa7ff;--good:#5fd3a9;--good-bg:#12352a;--bad:#ffb27a;--bad-bg:#3a2615;--best:#1f2b42}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--text);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","DejaVu Sans",sans-serif}
header,main{max-width:1040px;margin:0 auto;padding:0 24px}
header{padding-top:40px}
h1{font-size:2rem;line-height:1.2;letter-spacing:-.02em;margin:0 0 8px}
h2{font-size:1.35rem;letter-spacing:-.01em;margin:0 0 12px}
h3{font-size:1.05rem;margin:28px 0 6px}
p{margin:0 0 12px;max-width:72ch;color:var(--muted)}
nav{display:flex;flex-wrap:wrap;gap:6px 18px;padding:8px 0 4px;font-size:.92rem}
nav a{color:var(--accent);text-decoration:none}
nav a:hover{text-decoration:underline}
section{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:24px;margin:24px 0}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(215px,1fr));gap:14px;margin:20px 0 0}
.card{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:14px 18px;
display:flex;flex-direction:column}
.card span{color:var(--muted);font-size:.85rem}
.card b{font-size:1.6rem;font-weight:650;letter-spacing:-.02em;font-variant-numeric:tabular-nums}
.card b small{font-size:1.05rem;font-weight:450;color:var(--muted)}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.93rem;font-variant-numeric:tabular-nums}
th{text-align:left;font-weight:600;color:var(--muted);font-size:.85rem;border-bottom:2px solid var(--line);
padding:6px 12px 6px 8px;white-space:nowrap}
td{padding:7px 12px 7px 8px;vertical-align:top;white-space:nowrap}
td small{display:block;color:var(--muted);font-size:.75rem;line-height:1.2}
.number{text-align:right}
th.group{text-align:center;border-bottom:1px solid var(--line)}
tr.chance td{color:var(--muted);border-top:1px solid var(--line)}
tr.chance td:first-child{color:var(--text)}
tr.best td{font-weight:600;background:var(--best)}
tr.best td small{font-weight:400}
.note{font-size:.85rem;margin-top:18px}
.chart{margin:8px 0 12px}
.chart img{width:100%;height:auto;display:block}
.chart figcaption{color:var(--muted);font-size:.85rem;margin-top:4px}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(320px,1fr));gap:20px}
.query{display:grid;grid-template-columns:minmax(180px,250px) 1fr;gap:20px;padding:16px 0;
border-top:1px solid var(--line)}
.asked img{display:block;max-width:144px;max-height:144px;border-radius:8px;margin-top:10px}
.badge{display:inline-block;border-radius:99px;padding:1px 10px;font-size:.8rem;font-weight:600;
margin-right:8px}
.hit{background:var(--good-bg);color:var(--good)}
.miss{background:var(--bad-bg);color:var(--bad)}
.place{color:var(--muted);font-size:.8rem}
blockquote{margin:8px 0 0;font-size:.93rem;line-height:1.45;overflow-wrap:anywhere}
.row{display:flex;flex-wrap:wrap;gap:10px;align-content:flex-start}
.row figure{margin:0;padding:4px;border:2px solid var(--line);border-radius:8px;width:98px}
.row figure.right{border-color:var(--good);box-shadow:0 0 0 2px var(--good)}
.row figure.far{margin-left:14px}
.row img{width:100%;height:92px;object-fit:contain;display:block;border-radius:4px;background:#fff}
.row figcaption{font-size:.75rem;color:var(--muted);text-align:center;padding-top:3px;
font-variant-numeric:tabular-nums}
.texts{list-style:none;margin:0;padding:0;display:flex;flex-direction:column;gap:6px}
.texts li{border:1px solid var(--line);border-radius:8px;padding:6px 10px;font-size:.9rem;line-height:1.4;
overflow-wrap:anywhere}
.texts li.right{border-color:var(--good);box-shadow:0 0 0 1px var(--good)}
.texts span{color:var(--muted);font-size:.78rem;font-variant-numeric:tabular-nums}
dl{display:grid;grid-template-columns:minmax(140px,max-content) 1fr;gap:4px 20px;margin:0 0 16px;
font-size:.93rem}
dt{color:var(--muted)}
dd{margin:0;overflow-wrap:anywhere}
details{margin-top:8px}
summary{cursor:pointer;color:var(--accent)}
pre{overflow:auto;max-height:420px;font-size:.8rem;line-height:1.45;background:var(--bg);padding:14px;
border-radius:8px}
@media (max-width:700px){.query{grid-template-columns:1fr}section{padding:16px}header,
main{padding-left:14px;
padding-right:14px}}
@media print{section{break-inside:avoid}body{background:#fff}}
"""
