"""`r1v-rl chat`: questions about pictures, answered while one watches."""
