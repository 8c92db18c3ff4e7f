"""`torchtitan report`: what runs logged, as a page that needs nothing but itself."""
