"""The metrics under one name: scores with intervals, SQL on test databases, systems compared."""

from helpers.comparing import (CHAT, chat_answer, chat_prompts, check_parameters, compare,
                               token_losses, verifiable)
from helpers.generation import generate
from helpers.scoring import (Estimate, bootstrap, chrf, difference, estimate, evaluate, rouge_l,
                             score, summarise, undecidable)
from helpers.sql_databases import fill_databases, run_sql
from helpers.sql_queries import normalise_sql
from helpers.sql_scoring import sql_exact, sql_execution

__all__ = ["CHAT", "Estimate", "bootstrap", "chat_answer", "chat_prompts", "check_parameters",
           "chrf", "compare", "difference", "estimate", "evaluate", "fill_databases",
           "generate", "normalise_sql", "rouge_l", "run_sql", "score", "sql_exact",
           "sql_execution", "summarise", "token_losses", "undecidable", "verifiable"]
