"""`millpond web`: a page that shows what goes on, and a console; all that it needs is served from here."""
