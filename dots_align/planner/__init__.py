"""`dots-align plan`: will a recipe fit, how fast will it be, and what to change."""
