"""The contract: what a strategy declares, and what every strategy must do, verified for anybody's."""
