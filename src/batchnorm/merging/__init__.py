"""Several networks made one: their weights averaged, their statistics pooled or measured again.

average      the mean of the weights, with statistics that are measured or pooled
pool_states  the running statistics of several state dicts, by the law of total variance
repair       the means and deviations of an interpolated network's units, measured and set
"""
