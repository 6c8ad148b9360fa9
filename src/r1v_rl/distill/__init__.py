"""AL-CoTD: reasoning chains of fitting length, distilled from the model itself, judged, revised and exported."""
